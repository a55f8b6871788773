//! What the tutorial shows in 一、fork 系统调用. A change of `main` needs a change here.

use std::process::Command;

/// 200 runs, since without the parent's wait, only some runs print a wrong parent.
#[test]
fn parent_and_child_know_each_other() {
    for _ in 0..200 {
        let run = Command::new(env!(concat!("CARGO_BIN_EXE_", env!("CARGO_PKG_NAME"))))
            .output()
            .unwrap();
        assert!(run.status.success() && run.stderr.is_empty(), "{run:?}");
        let output = String::from_utf8(run.stdout).unwrap();
        let lines: Vec<&str> = output.lines().collect();
        assert_eq!(lines.len(), 3, "not three lines: {output}");

        let parent = lines[0]
            .strip_prefix("Process (")
            .and_then(|line| line.strip_suffix(") start..."))
            .expect(&output);

        // Parent and child print at the same time, so either line may be the first.
        let created = format!("I ({parent}) just created a child process (");
        let child = lines[1..]
            .iter()
            .find_map(|line| line.strip_prefix(&created)?.strip_suffix(")."))
            .expect(&output);
        let line = format!("I am child process ({child}) and my parent is {parent}.");
        assert!(lines[1..].contains(&line.as_str()), "no {line}: {output}");
        assert_ne!(child, parent, "only one process: {output}");
    }
}
