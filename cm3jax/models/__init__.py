"""Networks: the decoder, the image tokenizer and their parts."""
