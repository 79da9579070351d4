"""Two kinds for rdiff: an evaluator of translations, and ensembles."""
