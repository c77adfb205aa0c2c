"""What a compiled step will take of machines that are not here: memory, work, messages and time, as plain arithmetic.

- `topologies`: words such as "v5p:4x4x4" to chips with published figures;
- `program_text`: the text of a compiled program to instructions, with how often each runs;
- `traffic`: products, bytes and messages of such a program, messages by axis of the mesh;
- `estimate`: from these to memory by part, step time and utilisation.

Nothing here imports jax: every function takes text or numbers.
"""
