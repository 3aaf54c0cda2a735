//! What a person reads: numbered steps, aligned rows, and whether each came out
//! as it should.

use std::io::IsTerminal as _;

const LABEL: usize = 10;

pub struct Screen {
    colour: bool,
    step: usize,
    checks: usize,
    failed: Vec<String>,
}

#[derive(Clone, Copy)]
enum Paint {
    Bold = 1,
    Dim = 2,
    Red = 31,
    Green = 32,
}

impl Screen {
    pub fn new() -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self {
            colour,
            step: 0,
            checks: 0,
            failed: Vec::new(),
        }
    }

    fn paint(&self, paint: Paint, text: &str) -> String {
        if self.colour {
            format!("\x1b[{}m{text}\x1b[0m", paint as u8)
        } else {
            text.to_owned()
        }
    }

    pub fn title(&self, text: &str) {
        println!("{}", self.paint(Paint::Bold, text));
    }

    pub fn line(&self, text: &str) {
        println!("   {text}");
    }

    pub fn step(&mut self, text: &str) {
        self.step += 1;
        println!();
        self.title(&format!("{}. {text}", self.step));
    }

    /// A label and text; further lines of the text are aligned with its first.
    pub fn row(&self, label: &str, text: &str) {
        let mut label = label;
        for line in text.trim_end().lines() {
            println!(
                "   {}{line}",
                self.paint(Paint::Dim, &format!("{label:LABEL$}"))
            );
            label = "";
        }
    }

    /// Says whether something is so; if not, the demonstration fails in the end.
    pub fn check(&mut self, what: &str, so: bool) {
        self.checks += 1;
        let (paint, word) = if so {
            (Paint::Green, "ok")
        } else {
            (Paint::Red, "NOT SO")
        };
        println!("   {}{what}", self.paint(paint, &format!("{word:LABEL$}")));
        if !so {
            self.failed.push(format!("step {}: {what}", self.step));
        }
    }

    /// The last words; fails if a check did.
    pub fn finish(self, seconds: f64) -> anyhow::Result<()> {
        println!();
        if self.failed.is_empty() {
            let text = format!("All {} checks hold. {seconds:.0} seconds.", self.checks);
            println!("{}", self.paint(Paint::Green, &text));
            return Ok(());
        }
        anyhow::bail!(
            "of {} checks, these do not hold:\n  {}",
            self.checks,
            self.failed.join("\n  ")
        )
    }
}
