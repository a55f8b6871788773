//! A parent runs other programs, and waits for each to end.
//!
//! The tutorial's section 四、subprocess, `demo2/subpro.py`.
//! Run it with `cargo run -p subpro`.

use std::error::Error;
use std::io::{self, Write};
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    let _r = Command::new("/bin/sh")
        .args(["-c", "ps -aux|grep python"])
        .status()
        .map_err(|e| format!("/bin/sh: {e}"))?; // the error itself names no program

    println!("---------------");
    io::stdout().flush()?; // if std still buffers that line, ls would print first

    let _r2 = Command::new("ls")
        .args(["-l"])
        .status()
        .map_err(|e| format!("ls: {e}"))?;

    println!("---------------");
    io::stdout().flush()?; // if std still buffers that line, ping would print first

    let mut r3 = Command::new("ping")
        .args(["-c", "4", "www.baidu.com"])
        .spawn()
        .map_err(|e| format!("ping: {e}"))?;
    r3.wait()?; // Let the parent wait until the child has ended
    Ok(())
}
