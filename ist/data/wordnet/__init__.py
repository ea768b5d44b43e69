"""WordNet's nouns: as a graph, and as glosses with what they are kinds of."""
