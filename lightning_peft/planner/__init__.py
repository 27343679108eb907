"""What a run will take, counted before anything is loaded."""
