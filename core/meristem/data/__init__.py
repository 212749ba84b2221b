"""From files to packs: records, tokens, stores, order. No module of a network and no trainer is known here."""
