"""From a user's file to micro-batches: records, encoded, order, batches."""
