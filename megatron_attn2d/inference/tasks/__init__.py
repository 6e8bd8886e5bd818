"""Questions about long texts, generated from local text, and how answers are scored."""
