"""WordNet's nouns: as a graph, and as glosses labeled with their hypernyms."""
