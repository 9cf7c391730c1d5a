"""What the user sees at the end: tables in the terminal and in files."""
