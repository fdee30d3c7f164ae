"""Records of runs, and what is made of them: knows no host framework."""
