"""How people see results: tables and plots. Results come in, text and pictures go out; nothing is printed here."""
