"""Names of the literature that are no method of their own: presets, and what does not work here.

A preset stands here only if a paper or another library gives the combination its name.
"""

from __future__ import annotations

from collections.abc import Mapping

from deltatune.core.presets import ABSENT, PRESETS, Absent, Preset

_PRESETS: Mapping[str, Preset] = {
    "mam": Preset(
        expression="prefix(length=30) + parallel(bottleneck=512)",
        text="""Mix-and-match adapter: a short prefix of every attention, and a wide scaled parallel
        adapter beside every feed-forward.

        He et al. 2022, arXiv:2110.04366. The authors train the prefixes through an MLP, which is
        `reparameterise=True`; what is stored is the same.
        """,
        aliases=("mix_and_match",),
    ),
    "unipelt": Preset(
        expression="gate(prefix(length=10), pfeiffer(bottleneck=48), lora(rank=8, alpha=8.0))",
        text="""UniPELT: a prefix, an adapter and a LoRA, each times a gate σ(W x + b) from what its
        site reads.

        Mao et al. 2021, arXiv:2110.07577. The gate of a LoRA takes the place of alpha / rank. For
        what differs from the authors' gates see `gate`; they train the prefix through an MLP of
        512, which is `reparameterise=True`.
        """,
        aliases=("apl",),
    ),
    "p_tuning_v2": Preset(
        expression="prefix(length=100)",
        text="""P-tuning v2: K' = [P_K; K], V' = [P_V; V] in every attention, without an MLP.

        Liu et al. 2021, arXiv:2110.07602. The authors choose the length for each task, up to 100,
        and tune the reparameterisation on and off; their classification heads are `head`.
        """,
        aliases=("deep_prompt",),
    ),
    "warp": Preset(
        expression="prompt(length=20) + head",
        text="""WARP: softmax_c(v_c · h([P; E(x)]) + b_c), virtual tokens and a verbaliser trained
        together.

        Hambardzumyan et al. 2021, arXiv:2101.00121. The verbaliser is `head`, here of two labels;
        for three write `prompt(length=20) + head(labels=3)`. The authors put the tokens around and
        behind the text too, and read the state of a mask, with v_c from the words of the labels and
        no b_c; here the classifier reads what it reads without a delta.
        """,
        aliases=("adversarial_reprogramming",),
    ),
    "spot": Preset(
        expression="prompt(length=100)",
        text="""SPoT: [P; E(x)], where P begins as the prompt of another task.

        Vu et al. 2022, arXiv:2110.07904. The preset is the prompt alone: train it on the source
        task, and give that delta to `start_from` of `core.start` before training on the target.
        `composition.nearest` finds the source that is most like a prompt of the target, trained for
        a short while, by the cosine of their mean tokens or over pairs of tokens.
        """,
        aliases=("prompt_transfer",),
    ),
    "ppt": Preset(
        expression="prompt(length=100)",
        text="""PPT: [P; E(x)], where P begins as a prompt that was trained on tasks without labels.

        Gu et al. 2022, arXiv:2109.04332. The preset is the prompt alone: train it on sentences of
        running text cast in the form of the task (does this one follow that one?), and give that
        delta to `start_from` of `core.start` before training on the few labelled rows.
        """,
        aliases=("pre_trained_prompt",),
    ),
    "s4": Preset(
        expression=(
            "adapter(at='block[:5/6].attention | block[:5/6].ffn') "
            "+ prefix(at='block[1/6:].attention') "
            "+ bitfit(at='block[1/2:].linear | block[1/2:].norm') "
            "+ lora(at='block[:1/6].attention.q | block[:1/6].attention.v "
            "| block[5/6:].attention.q | block[5/6:].attention.v')"
        ),
        text="""S4: blocks in four groups like a spindle, {adapter, LoRA}, {adapter, prefix},
        {adapter, prefix, BitFit} and {prefix, BitFit, LoRA}.

        Chen et al. 2023, arXiv:2301.01821. The groups hold a sixth, a third, a third and a sixth of
        the blocks of each stack, so that a stack needs six of them; the authors' sizes, which spend
        0.5 % of the parameters, are left to the caller.
        """,
    ),
    "qlora": Preset(
        expression="lora(rank=64, dropout=0.1, at='block.linear')",
        text="""QLoRA: Q(W) + (alpha / rank) B A at every linear map of the blocks.

        Dettmers et al. 2023, arXiv:2305.14314. The preset is the delta alone: load the backbone
        with `quantise='nf4'`. The authors halve the dropout for 33 billion parameters and more.
        """,
    ),
    "l_lora": Preset(
        expression="lora_fa",
        text="""L-LoRA: W' = W + (alpha / rank) B A0, LoRA linearised where it begins.

        Tang et al. 2023, arXiv:2310.04742. The authors replace what each adapted map gives by its
        tangent in A and B at the start, A0 and B0: s (B A0 + B0 (A - A0)). B0 is zero, so that A
        has no gradient and stays: LoRA-FA. What several tasks have learned from one seed is added
        up in `composition`.
        """,
        aliases=("linearised_lora", "partial_linearisation"),
    ),
    "lora_all": Preset(
        expression="lora(at='block.linear')",
        text="""LoRA on all linear maps: W' = W + (alpha / rank) B A at every linear map of every
        block.

        Dettmers et al. 2023, arXiv:2305.14314. PEFT's `all-linear`.
        """,
        aliases=("all_linear",),
    ),
    "bitfit_half": Preset(
        expression="bitfit(at='attention.q | ffn.up')",
        text="""BitFit, half of it: b' = b + d for the biases of queries and of the first map of
        every feed-forward.

        Ben-Zaken et al. 2021, arXiv:2106.10199. Half of the entries, and in the paper nearly as
        good. Where queries, keys and values are fused (GPT-2) queries cannot be selected alone.
        """,
    ),
    "last_quarter": Preset(
        expression="last_layer(at='block[3/4:]')",
        text="""Last-quarter tuning: W' = v for every parameter of the last quarter of the blocks.

        Lee et al. 2019, arXiv:1911.03090. In an encoder-decoder of both stacks. The authors train
        the task's head along; add `head`.
        """,
    ),
    "s_mam": Preset(
        expression=(
            "pruned_prefix(length=30, structured=True) "
            "+ pruned_parallel(bottleneck=512, structured=True)"
        ),
        text="""S-MAM: the mix-and-match adapter, of which whole tokens and hidden units are kept.

        Lawton et al. 2023, arXiv:2305.16597. Each of the two keeps its share; the authors have one
        budget for both.
        """,
    ),
    "u_mam": Preset(
        expression="pruned_prefix(length=30) + pruned_parallel(bottleneck=512)",
        text="""U-MAM: the mix-and-match adapter, of which single entries are kept.

        Lawton et al. 2023, arXiv:2305.16597. Each of the two keeps its share; the authors have one
        budget for both.
        """,
    ),
    "simultaneous_combination": Preset(
        expression="prompt(length=10) + bitfit + adapter",
        text="""Simultaneous combination: virtual tokens, every bias and a bottleneck behind every
        sublayer, trained together.

        Ding et al. 2023, Nature Machine Intelligence. The sum of all three of their table; its
        parts are sums of the same methods. The biases of their backbone include the head's.
        """,
    ),
    "cross_attention_tuning": Preset(
        expression="last_layer(at='cross_attention')",
        text="""Cross-attention tuning: W' = v for every map of every cross-attention.

        Gheini et al. 2021, arXiv:2104.08771. The authors train the embeddings of a new language
        along; add `embedding_tuning`.
        """,
    ),
    "attention_tuning": Preset(
        expression="last_layer(at='attention')",
        text="""Attention tuning: W' = v for every map of every attention.

        Touvron et al. 2022, arXiv:2203.09795. There for vision transformers. The maps of queries,
        keys, values and output; norms stay frozen.
        """,
    ),
    "uddia": Preset(
        expression="bitfit(at='block[1/2:].linear | block[1/2:].norm')",
        text="""Inference-time bias tuning: b' = b + d in the upper blocks, d tuned anew for every
        text while it is generated.

        Yang et al. 2023, arXiv:2210.04492. The preset is the biases alone: `core.adapting` takes
        the steps and undoes them, down a loss of the caller's own, as the authors' of detoxifying
        and of fluency. They choose how many blocks as they go; here it is the upper half.
        """,
        aliases=("inference_time_bias_tuning",),
    ),
    "embedding_tuning": Preset(
        expression="last_layer(at='embedding')",
        text="""Embedding tuning: E' = v for the embeddings, all else frozen.

        Artetxe et al. 2020, arXiv:1910.11856. There the embeddings of another language, drawn
        afresh; here they start at those of the backbone.
        """,
    ),
}

_ABSENT: Mapping[str, Absent] = {
    "coda": Absent(
        reason=(
            "it sends only some tokens through a frozen block, and no face changes which tokens "
            "the backbone computes"
        ),
        nearest="parallel(at='attention | ffn')",
        text="""CoDA: y = x + BN(x) for all tokens, and the frozen block for the k that a router
        chooses.

        Lei et al. 2023, arXiv:2304.04947.
        """,
        category="addition",
        review_category="additive",
        count="2dm + m + 2 d",
    ),
    "longlora": Absent(
        reason=(
            "while it trains, attention runs within shifted groups of tokens, and no face changes "
            "which tokens attend to each other"
        ),
        nearest="lora + ln_tuning + last_layer(at='embedding')",
        text="""LongLoRA: LoRA with trained embeddings and norms, under shifted sparse attention.

        Chen et al. 2023, arXiv:2309.12307.
        """,
        category="reparameterisation",
        review_category="reparameterised",
        count="r (i + d), embeddings and norms",
    ),
    "loraprune": Absent(
        reason=(
            "it removes heads and channels of the backbone as it trains, and a delta leaves its "
            "backbone as it is"
        ),
        nearest="lora",
        text="""LoRAPrune: LoRA whose gradients say which heads and channels are taken out.

        Zhang et al. 2023, arXiv:2305.18403.
        """,
        category="reparameterisation",
        review_category="reparameterised",
        count="r (i + d)",
    ),
    "attention_fusion": Absent(
        reason=(
            "it reads the states that a token has in all layers at once, and a face sees one site"
        ),
        nearest="head",
        text="""AttentionFusion: a token's state is Σ_j softmax_j(h_j · q / √d) h_j over all
        layers j.

        Cao et al. 2022, Findings of NAACL.
        """,
        category="addition",
        review_category="additive",
        count="d, once",
    ),
    "s3delta": Absent(
        reason=(
            "it searches which sites to tune by a second gradient on validation data; a delta has "
            "its sites from the start"
        ),
        nearest="lora(rank=1, at='block.linear') + low_rank_adapter + bitfit",
        text="""S³Delta: sites of LoRA, adapters, biases and norms chosen by gates under a budget.

        Hu et al. 2022, arXiv:2206.07382.
        """,
        category="reparameterisation",
        review_category="hybrid",
        count="within the budget",
    ),
    "autopeft": Absent(
        reason=(
            "it is a search over many trained deltas, not a delta; `compare` trains the candidates "
            "that you name"
        ),
        nearest="adapter + parallel + prefix",
        text="""AutoPEFT: sizes of adapters and prefixes, and their blocks, by Bayesian
        optimisation.

        Zhou et al. 2023, arXiv:2301.12132.
        """,
        category="addition",
        review_category="hybrid",
        count="what the search chooses",
    ),
}

for _name, _preset in _PRESETS.items():
    PRESETS.add(_name, _preset, _preset.aliases)
for _name, _absent in _ABSENT.items():
    ABSENT.add(_name, _absent)
