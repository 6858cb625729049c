"""Firewall: what may be trained on. Records in; an admitted list, and a reason for every one refused, out."""
