"""DNA: its families of foreign models and the tokenizer of words of k bases."""
