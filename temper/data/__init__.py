"""The template contract, sequences and batches: how records become what a learner reads."""
