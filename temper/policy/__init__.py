"""The mutable model: log-probs, adapters, head, losses, advantages and KL estimators."""
