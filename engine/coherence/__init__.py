"""What lets frames help each other: future frames attended, past frames remembered. torch only."""
