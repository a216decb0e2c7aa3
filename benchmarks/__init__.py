"""Speed and memory against the incumbents, as ratios measured in one run."""
