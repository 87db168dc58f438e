"""What agents talk to: reports in, orders out, over TLS."""
