"""How the shipped models were trained. Runs from a checkout; not part of the installed package."""
