"""What all experiments share: settings, building, the run folder, trust, messages, tables and pictures."""
