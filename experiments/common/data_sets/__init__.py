"""Images and alphabets, embedded or read from a folder."""
