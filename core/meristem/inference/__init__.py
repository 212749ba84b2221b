"""From files of records to files of vectors and predictions: streamed, resumable, in input order."""
