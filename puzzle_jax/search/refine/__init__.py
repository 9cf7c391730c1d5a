"""What follows the program: lower KL, where it proves itself."""
