"""The whole lap: data, phases, measurements, gate, release, serving, report. The only room that knows all others."""
