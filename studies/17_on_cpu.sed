# The published script of result #17 for a machine without a GPU, for studies/parity.py: no CUDA, 12 layers 128 wide,
# 2048 tokens a step (as in 17_on_cpu.recipe), and the weights that train_gpt.py draws of a seed. All else is as it was.
#
#   git clone --filter=blob:none --no-checkout https://github.com/KellerJordan/modded-nanogpt logs/modded-nanogpt
#   git -C logs/modded-nanogpt show HEAD:records/track_3_optimization/results/20260505_aurora/298f02bc-dbb4-4661-9ad8-f6429d532873.txt > logs/17.txt
#   python -m records extract logs/17.txt | sed -f studies/17_on_cpu.sed > logs/17_on_cpu.py
#   python data/local.py --encoding gpt2 /usr/share /usr/lib/python3
#   python -m studies.parity --script logs/17_on_cpu.py --pairs -o studies/results/parity_17 @studies/17_on_cpu.recipe
#
# At a quarter of the rates (of the head's a half), where rounding does not grow as fast:
#
#   sed 's/lr=0.3)/lr=0.075)/; s,lr=1/320,lr=1/640,; s/lr=0.01)/lr=0.0025)/; s/lr=0.0375/lr=0.01/' logs/17_on_cpu.py > logs/17_slower.py
#   python -m studies.parity --script logs/17_slower.py --pairs --steps 100 -o studies/results/parity_17_slower \
#       @studies/17_on_cpu.recipe embed_lr=0.075 head_lr=0.0015625 vector_lr=0.0025 matrix_lr=0.01
s/pin_memory=True/pin_memory=False/
s/device="cuda"/device="cpu"/
s/torch.device("cuda", .*/torch.device("cpu")/
/^torch.cuda.set_device/d
s/backend="nccl", device_id=device/backend="gloo"/
s/torch.cuda.get_device_name(device)/'CPU'/
s/\.cuda()//
s/model_dim=768/model_dim=128/
s/head_dim=128/head_dim=32/
s/seq_len=1024/seq_len=128/
s/^batch_size = .*/batch_size = 2048/
s/^num_trials = .*/num_trials = 1/
s/# initialize model parameters/torch.manual_seed(int(sys.argv[-1]))  # --seed S/
s/w.normal_()/w.copy_(torch.randn(w.shape))/
s/w.normal_(mean=1, std=0)/w.fill_(1)/
