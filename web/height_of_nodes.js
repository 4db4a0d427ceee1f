// In Nodes 2.0 advanced inputs are hidden, but a node that is new or opened is made as high as if they were shown. This
// takes that room away from ControlNeXt's nodes, unless somebody made them higher still.

import { app } from "../../scripts/app.js"

app.registerExtension({ name: "comfyuicontrolnext.HeightOfNodes", nodeCreated: fit, loadedGraphNode: fit })

function fit(node) {
    const { vueNodesMode, NODE_WIDGET_HEIGHT } = window.LiteGraph
    if (!vueNodesMode || node.showAdvanced || node.constructor.nodeData?.category != "ControlNeXt") return
    const height = node.computeSize()[1]
    const hidden = (node.widgets ?? []).filter(({ options }) => options?.advanced)
    if (hidden.length && node.size[1] == height)
        node.setSize([node.size[0], height - hidden.length * (NODE_WIDGET_HEIGHT + 4)])
}
