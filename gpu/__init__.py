"""One command for the minutes in which a GPU is at hand: prove, measure, write down. See gpu/run.py."""
