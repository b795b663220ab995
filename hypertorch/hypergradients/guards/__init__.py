"""What is looked at before a number is trusted."""
