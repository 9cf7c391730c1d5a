"""Results for the user: tables in the terminal and in files."""
