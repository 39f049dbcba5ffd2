# The published script of result #8, after 17_on_cpu.sed and small_on_cpu.sed, for studies/parity.py: the weights that
# train_gpt.py draws of a seed, in its order, and a quarter of the rates (half of the head's). All else is as it was.
# With show, small and pair of 46_on_cpu.sed:
#
#   show 20260430_normuonh/15b3e591-24fc-40dd-8547-8f201896d260.txt > logs/08.txt
#   python -m records extract logs/08.txt | small -f studies/08_on_cpu.sed > logs/08_on_cpu.py
#   pair --script logs/08_on_cpu.py -o studies/results/parity_08 @08_normuonh @studies/stand_in.recipe matrix_lr=0.0045
#
# Result #36's, which draws as #17's does:
#
#   show 20260610_tuned_baseline_3250/263ea3c4-2b13-4adf-8a71-0410386b20e1.txt > logs/36.txt
#   python -m records extract logs/36.txt | small -e 's/lr=0.7)/lr=0.175)/; s/lr=0.004)/lr=0.002)/' \
#       -e 's/lr=0.015)/lr=0.00375)/; s/lr=0.025/lr=0.00625/' > logs/36_on_cpu.py
#   pair --script logs/36_on_cpu.py -o studies/results/parity_36 @36_muon_tuned @studies/stand_in.recipe \
#       embed_lr=0.175 head_lr=0.002 vector_lr=0.00375 matrix_lr=0.00625
/# --seed S/a\
model.embed.weight.data.copy_(torch.randn(model.embed.weight.shape))\
for block in model.blocks:\
    attn, fc, proj = block.attn, block.mlp.fc, block.mlp.proj\
    qkv = attn.q, attn.k, attn.v\
    for w in (*[x.weight for x in qkv], *[x.bias for x in qkv], attn.proj.weight, fc.weight, fc.bias, proj.weight):\
        w.data.copy_((2 * torch.rand(w.shape) - 1) / (w.size(1) if w.ndim == 2 else fc.weight.size(1))**0.5)
s/lr=0.3)/lr=0.075)/
s,lr=1/320),lr=1/640),
s/lr=0.01)/lr=0.0025)/
s/lr=0.018)/lr=0.0045)/
