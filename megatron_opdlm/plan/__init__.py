"""What every rank of a run would hold, before it starts."""
