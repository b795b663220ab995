"""What all experiments share: settings, building, training, the run folder, trust, messages, tables and pictures."""
