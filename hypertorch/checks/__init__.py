"""What is checked of everything that users hand in: values, and the types that annotations name."""
