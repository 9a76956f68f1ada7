"""The comparisons of scripts/bench.sh."""
