// What ControlNeXt's nodes show on themselves: what was loaded or saved, where a stopped training was kept, and a chart
// of the strength over the sampling.
//
// It comes in a node's output, `text` and `strengths`, or, while the node runs, as a message "controlnext_text". It stays
// until the node runs again. Texts go into the node's properties when the job ends, so that a saved workflow and a
// reloaded page have them. (ComfyUI's own text on a node, progress_text, vanishes with the job, from its frontend 1.54
// on; pictures in the output would be among the result pictures of whoever uses the API.)

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"

const NAME = "controlnext_text" // of the message, the property and the widget
const [MARGIN, PADDING, LINE] = [10, 8, 17] // in pixels: around the widget, in it, height of a line of text
const FONT = "12px sans-serif"
const STYLE = `
    box-sizing: border-box; padding: ${PADDING}px; border-radius: 4px; overflow: auto; user-select: text;
    font: ${FONT}; line-height: ${LINE}px; white-space: pre-wrap; overflow-wrap: anywhere;
    color: var(--input-text); background: var(--comfy-input-bg);`
const [WIDTH, HEIGHT] = [384, 160] // of the chart
const [LEFT, TOP, RIGHT, BOTTOM] = [30, 12, 374, 136] // of the plot in it
const LABELS = { en: ["begin", "strength over the sampling", "end"], zh: ["开始", "采样过程中的强度", "结束"] }

app.registerExtension({
    name: "comfyuicontrolnext.ShownOnNodes",

    setup() {
        api.addEventListener("executing", ({ detail: id }) => show(nodeOf(id), { text: "", strengths: null }))
        api.addEventListener(NAME, ({ detail: { node, text } }) => show(nodeOf(node), { text }))
        for (const end of ["execution_success", "execution_error", "execution_interrupted"])
            api.addEventListener(end, keep)
    },

    beforeRegisterNodeDef(nodeType, { category }) {
        if (category != "ControlNeXt") return
        follow(nodeType.prototype, "onConfigure", (node) => show(node, { text: node.properties[NAME] ?? "" }))
        follow(nodeType.prototype, "onExecuted", showOutput)
    },

    onNodeOutputsUpdated(outputs) { // a run is opened from the history
        for (const [id, output] of Object.entries(outputs)) showOutput(nodeOf(id), output)
    },
})

// Have `then(node, ...arguments)` run after a method of nodes, which may be missing.
function follow(prototype, method, then) {
    const before = prototype[method]
    prototype[method] = function (...given) {
        before?.apply(this, given)
        then(this, ...given)
    }
}

// The ControlNeXt node of the open workflow with an id: "3", "7:3" for node 3 of the subgraph that node 7 is, or
// "UUID:3" for node 3 of the subgraph with that id.
function nodeOf(id) {
    let graph = app.rootGraph, node
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById(part)
        graph = node?.subgraph ?? app.rootGraph.subgraphs.get(part)
    }
    return node?.constructor.nodeData?.category == "ControlNeXt" ? node : undefined
}

function showOutput(node, output) {
    if (output?.text) show(node, { text: output.text.join("\n") })
    if (output?.strengths) show(node, { strengths: output.strengths })
}

const shown = new WeakMap() // {node: {text, strengths}}
const unkept = new Set() // nodes whose text may not be in their properties yet

// Show a text or strengths on a node in place of those before; an empty text and no strengths show nothing.
function show(node, news) {
    if (!node) return
    const { text, strengths } = { ...shown.get(node), ...news }
    shown.set(node, { text, strengths })
    unkept.add(node)

    const widget = node.widgets?.find(({ name }) => name == NAME)
    const parts = [strengths && chartOf(strengths), text].filter(Boolean)
    if (parts.length) (widget ?? addWidget(node)).element.replaceChildren(...parts)
    else if (widget) node.removeWidget(widget)
    if (!window.LiteGraph.vueNodesMode) node.expandToFitContent() // Nodes 2.0 do so themselves
    node.setDirtyCanvas(true, true)
}

// Put the texts into the workflow, and have the frontend notice: it keeps changes for a reload of the page.
function keep() {
    const news = [...unkept].filter((node) => (node.properties[NAME] ?? "") != shown.get(node).text)
    unkept.clear()
    for (const node of news)
        if (shown.get(node).text) node.properties[NAME] = shown.get(node).text
        else delete node.properties[NAME]

    const tracker = app.extensionManager.workflow.activeWorkflow?.changeTracker
    if (news.length) tracker?.captureCanvasState ? tracker.captureCanvasState() : tracker?.checkState()
}

function addWidget(node) {
    const element = document.createElement("div")
    element.style.cssText = STYLE
    let content, width, height // as last measured
    const getMinHeight = () => {
        if (content != shown.get(node) || width != node.size[0]) {
            [content, width] = [shown.get(node), node.size[0]]
            height = heightOf(content, width - 2 * (MARGIN + PADDING)) + 2 * (MARGIN + PADDING)
        }
        return height
    }
    const widget = node.addDOMWidget(NAME, NAME, element,
        { serialize: false, hideOnZoom: false, margin: MARGIN, getMinHeight, getValue: () => element.textContent })
    widget.serialize = false // in workflow files; the option is for prompts
    return widget
}

// How many pixels a chart and a text take at this width. (The element has no height where it is out of sight.)
function heightOf({ text, strengths }, width) {
    const lines = text ? text.split("\n").map((line) => linesOf(line, width)) : []
    return lines.reduce((sum, count) => sum + count, 0) * LINE + (strengths ? width * HEIGHT / WIDTH : 0)
}

const pen = document.createElement("canvas").getContext("2d")

// How many lines a text without line breaks takes at this width: words that do not fit begin a line, and break in it
// where they are longer.
function linesOf(text, width) {
    pen.font = FONT
    let lines = 1, used = 0
    for (const word of text.split(/(?<= )/)) {
        const length = pen.measureText(word).width
        if (used && used + pen.measureText(word.trimEnd()).width > width) [lines, used] = [lines + 1, 0]
        lines += Math.floor((used + length - 1) / width)
        used = (used + length) % width
    }
    return lines
}

// A chart of strengths at even distances from the sampling's begin to its end. Its scale goes from 0, or the lowest
// strength if negative, to the highest, at least 1.
function chartOf(strengths) {
    const [low, high] = [Math.min(0, ...strengths), Math.max(1, ...strengths)]
    const y = (strength) => BOTTOM - (strength - low) / (high - low) * (BOTTOM - TOP)
    const x = (index) => LEFT + index / (strengths.length - 1) * (RIGHT - LEFT)
    const line = strengths.map((strength, index) => `${x(index)},${y(strength)}`).join(" ")
    const levels = [...new Set([low, 0, high])].map((level) => `
        <line x1="${LEFT}" x2="${RIGHT}" y1="${y(level)}" y2="${y(level)}" stroke="currentColor" opacity="0.3"/>
        <text x="${LEFT - 6}" y="${y(level) + 5}" text-anchor="end">${Number(level.toPrecision(3))}</text>`)

    const [begin, title, end] = LABELS[app.extensionManager.setting.get("Comfy.Locale")] ?? LABELS.en
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg")
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`)
    svg.style.cssText = "display: block; width: 100%"
    svg.innerHTML = `
        <polygon points="${line} ${RIGHT},${y(0)} ${LEFT},${y(0)}" fill="#78c8ff" opacity="0.35"/>
        <polyline points="${line}" fill="none" stroke="#78c8ff" stroke-width="2"/>
        <g fill="currentColor" font-size="15">
            ${levels.join("")}
            <text x="${LEFT}" y="${HEIGHT - 5}">${begin}</text>
            <text x="${(LEFT + RIGHT) / 2}" y="${HEIGHT - 5}" text-anchor="middle">${title}</text>
            <text x="${RIGHT}" y="${HEIGHT - 5}" text-anchor="end">${end}</text>
        </g>`
    return svg
}
