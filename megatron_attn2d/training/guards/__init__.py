"""What stops a training that would go wrong without a word: different ranks, wrong attention, NaN, damaged files."""
