"""The pages that show what was measured: records in docs/, and what is written from them."""
