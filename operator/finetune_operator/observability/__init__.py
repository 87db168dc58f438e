"""What people and their monitoring are told of the operator itself: metrics, probes, logs."""
