"""From files of records to files of vectors: streamed, resumable, in input order, with a loop of its own."""
