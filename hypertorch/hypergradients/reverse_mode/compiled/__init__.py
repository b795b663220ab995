"""Reverse mode by compiled functions: single steps, loops over steps, and a whole run as one program."""
