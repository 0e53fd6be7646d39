"""What a run is: its options, the rules between them, and the files they come from."""
