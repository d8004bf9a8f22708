"""The checkpoint shapes that several tests share: between them every property that has bitten a runtime."""

from checkpoints import CheckpointSpec

SHAPES = {
    # Grouped queries, tied head, newer configuration layout.
    "grouped": CheckpointSpec(layout="nested", naming="nested"),
    # The real tower's head_dim of 80, untied head, a checkpoint in shards.
    "head_dim_80": CheckpointSpec(
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=1,
        mrope_section=(4, 6, 6),
        embed_dim=160,
        num_heads=2,
        depth=3,
        num_hidden_layers=3,
        tie_word_embeddings=False,
        n_shards=3,
    ),
    # Widths that no block size and no panel of 16 divides.
    "odd_widths": CheckpointSpec(
        hidden_size=72,
        intermediate_size=100,
        num_attention_heads=3,
        num_key_value_heads=3,
        mrope_section=(4, 4, 4),
        vocab_size=1047,
        embed_dim=40,
        num_heads=2,
        mlp_ratio=3,
        tokenizer="vocab",
    ),
}
