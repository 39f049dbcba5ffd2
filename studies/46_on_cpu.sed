# The published scripts of results #44 and #46, after 17_on_cpu.sed and small_on_cpu.sed, for studies/parity.py: the
# weights that train_gpt.py draws of a seed, a quarter of the rates (half of the head's), everything that waits for a
# step brought into a run of 100, and floor and decay so strong that they act on weights this young. All else is as it
# was.
#
#   git clone --filter=blob:none --no-checkout https://github.com/KellerJordan/modded-nanogpt logs/modded-nanogpt
#   show() { git -C logs/modded-nanogpt show HEAD:records/track_3_optimization/results/$1; }
#   show 20260609_soap_f1_auxb2_clean/train_gpt_clean_SOTA.py > logs/44.py
#   show 20260619_cwd_rowfloor_tailema/train_gpt_cwd_SOTA.py > logs/46.py
#   small() { sed -f studies/17_on_cpu.sed -f studies/small_on_cpu.sed "$@"; }
#   for n in 44 46; do small -f studies/46_on_cpu.sed logs/$n.py > logs/${n}_on_cpu.py; done
#   python data/local.py --encoding bytes
#   pair() { python -m studies.parity --pairs --steps 100 --seeds 5 "$@"; }
#   for n in 44 46; do
#       pair --script logs/${n}_on_cpu.py --runs logs/parity_$n -o studies/results/parity_$n \
#           @studies/stand_in.recipe @studies/${n}_on_cpu.recipe
#   done
#
# and #46's once more, with `-o studies/results/parity_46_average` and metric=val_ema_loss: of the same runs, the loss of
# their average.
#
# At twice the width, these and the scripts of 08_on_cpu.sed: the script by
#
#   for n in 08 36 44 46; do sed s/model_dim=64/model_dim=128/ logs/${n}_on_cpu.py > logs/${n}_wide.py; done
#
# and the pairs as above, with that script, `--seeds 4 --runs logs/wide_$n -o studies/results/parity_${n}_wide` and, as
# the last word, model_dim=128.
#
# In the order in which train_gpt.py draws, from one generator:
/# --seed S/a\
model.embed.weight.data.copy_(torch.randn(model.embed.weight.shape))\
for block in model.blocks:\
    qkv, fc = (block.attn.q, block.attn.k, block.attn.v), block.mlp.fc\
    for w in (*[x.weight for x in qkv], *[x.bias for x in qkv], fc.weight, fc.bias):\
        w.data.copy_((2 * torch.rand(w.shape) - 1) / fc.weight.size(1)**0.5)
s/gen = torch.Generator(device=device)/gen = torch.default_generator/
/gen.manual_seed/d
s/^HEAD_DIM = 128/HEAD_DIM = 32/
s/^_CGI_PAIR_FROM_LAYER = 6/_CGI_PAIR_FROM_LAYER = 2/
# rates, and when they fall
s/lr=0.3)/lr=0.075)/
s,lr=1/320),lr=1/640),
s/dict(params=\(.*\), lr=0.01,/dict(params=\1, lr=0.0025,/
s/^MUON_LR = .*/MUON_LR = 0.01/
s/^FINAL_SCHEDULE_STEPS = .*/FINAL_SCHEDULE_STEPS = 100/
s/^ADAM_EMBED_POWER_C = .*/ADAM_EMBED_POWER_C = 0.075 \/ 50**1.2/
s/^ADAM_PROJ_POWER_C = .*/ADAM_PROJ_POWER_C = 1 \/ 640 \/ 50**1.2/
s/^ADAM_OTHER_POWER_C = .*/ADAM_OTHER_POWER_C = 0.0025 \/ 50**1.2/
s/^MUON_POWER_C = .*/MUON_POWER_C = 0.01 \/ 80**1.2/
# momentum, gate, lookahead, average
s/^_MU_WARMUP_STEPS = 300/_MU_WARMUP_STEPS = 20/
s/^_MU_COOLDOWN_STEPS = 200/_MU_COOLDOWN_STEPS = 10/
s/^ATTN_TRUST_FLOOR_END_STEP = 1375/ATTN_TRUST_FLOOR_END_STEP = 45/
s/^ATTN_TRUST_FLOOR_FADE_END_STEP = 1625/ATTN_TRUST_FLOOR_FADE_END_STEP = 55/
s/lookahead_ema=0.99/lookahead_ema=0.9/
s/prefill_steps=300/prefill_steps=10/
s/rest_steps=train_steps - 950/rest_steps=65/
s/^TAILEMA_TAU = .*/TAILEMA_TAU = 10.0/
s/^TAILEMA_START = .*/TAILEMA_START = 40/
s/^TAILEMA_END = .*/TAILEMA_END = 101/  # as ours, which averages after the last step too
# strengths
s/^TARGET_UW = .*/TARGET_UW = 1.5/
s/^CWD = .*/CWD = 1.0/
