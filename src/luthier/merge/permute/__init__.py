"""Parts for merges that match the units of two models: which axes go together, who matches whom, what is solved.

units           groups of axes, matched and separate units, and the weights of a partly merged layer
tracing         groups of a plain network, by following its graph
transformers    groups of a transformers model: hidden units, heads, the residual stream
capture         both models run side by side: the inputs and outputs of layers as rows
matching        who matches whom: by activations or by weights; how many stay separate
least_squares   the weights that fit the averaged features best, from Gram matrices or by Adam
budget          what a width costs, and which groups are worth being wide
widen           a module with these weights, of another width where they have one
"""
