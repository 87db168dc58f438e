"""The FineTuneJob API: one set of types for the CRD, the operator, the trainer and the command line."""
