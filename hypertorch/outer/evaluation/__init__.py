"""What outer variables are worth: on fresh episodes, at the end and during a run."""
