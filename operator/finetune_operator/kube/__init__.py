"""The Kubernetes API, as small as this operator needs it."""
