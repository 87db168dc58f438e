"""Turns FineTuneJob objects into gangs of pods that train, and tells the truth about them."""
