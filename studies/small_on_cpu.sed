# The size of stand_in.recipe, after 17_on_cpu.sed: bytes, 4 layers, 64 wide, 512 tokens a step; and nothing compiled,
# as in train_gpt.py on a CPU, so that a run takes seconds.
s/vocab_size=50304, num_layers=12, model_dim=128/vocab_size=257, num_layers=4, model_dim=64/
s/seq_len=128/seq_len=64/
s/^batch_size = .*/batch_size = 512/
/^model.compile/d
/^@torch.compile/d
