"""What a run leaves for its reader: tables, pages, pictures."""
