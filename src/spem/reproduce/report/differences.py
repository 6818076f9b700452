"""In what the reproduction differs from the paper, and what cannot be reproduced; in own words."""

DIFFERENCES: tuple[tuple[str, str], ...] = (
    (
        "Selection on the test set",
        "The paper's accuracies are those of the best of 164 epochs of one run, chosen by the "
        "test images themselves. Here the last epoch is the headline; the best epoch stands "
        "beside it under its own name, because only that is of the paper's kind. The paper gives "
        "no seeds and no deviations: its numbers are single draws.",
    ),
    (
        "A small start",
        "SPEM's gate begins at 0.032, so every residual branch starts almost silent. This alone "
        "can help a deep network. The paper has no control for it; the experiment “controls” "
        "has two.",
    ),
    (
        "The formula",
        "Text, figure 3 and the official program of the paper define three different modules: "
        "where the sigmoids stand and whether the two pools are mapped before or after they are "
        "mixed. SPEM means the text's form unless a row says otherwise.",
    ),
    (
        "The penalty",
        "The program adds 0.1 times the sum of |p|² over all blocks to the loss, so it grows with "
        "depth. It shrinks |p| and thereby lengthens the steps of lambda, which depends on the "
        "direction of p only: learned lambdas of single blocks carry little meaning.",
    ),
    (
        "CBAM's parameters",
        "The paper prints 1.92 M and 1.94 M. The official CBAM has 1.91 M and 1.93 M, and no "
        "variant of its parts that we know of reproduces both cells without being tuned to them.",
    ),
    (
        "ECA's parameters on CIFAR-100",
        "The paper prints 1.72 M, less than the plain network with 100 classes already has "
        "(1.73 M): this cell cannot be reached by any ECA.",
    ),
    (
        "Table 4, (b) to (e)",
        "The figure that named the reweight variants by letter is lost. Ours are named by their "
        "formula; which of the four letters they are cannot be recovered.",
    ),
    (
        "Table 4, (f) and (g)",
        "The text says that the maximum alone is better than the minimum alone and that (f) is "
        "above (g); the table has (g) above (f). Letters or rows are swapped in the paper.",
    ),
    (
        "Table 3 and Figure 2",
        "The values of lambda in Table 3 are lost and taken as 0.1, 0.3, 0.5, 0.7, 0.9, the first "
        "row being 0.1. Figure 2 prints no numbers; its grid of 0.1 to 0.9 is inferred.",
    ),
    (
        "Unknown settings",
        "The weight decay and the width of SE are not in the text; they are taken from the "
        "official program and from the printed parameter counts. The authors' code of the other "
        "modules is not public; those here follow their own papers.",
    ),
)
"""(what, how), one paragraph each."""
